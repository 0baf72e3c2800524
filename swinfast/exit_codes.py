"""What a command returns: done, done but for some images, unusable, interrupted."""

OK, SOME_FAILED, UNUSABLE, INTERRUPTED = 0, 1, 2, 130
