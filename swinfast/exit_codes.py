"""What a command returns: done; done but for some images or engines, or verified and failed; unusable; interrupted;
ended as nobody reads its output any more, as by SIGPIPE."""

OK, SOME_FAILED, UNUSABLE, INTERRUPTED, UNREAD = 0, 1, 2, 130, 141
