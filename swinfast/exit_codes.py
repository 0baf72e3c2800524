"""What a command returns: done; done but for some images or engines, or verified and failed; unusable; interrupted."""

OK, SOME_FAILED, UNUSABLE, INTERRUPTED = 0, 1, 2, 130
