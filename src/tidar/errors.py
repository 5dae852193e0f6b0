"""The one exception a user can cause, at the bottom of the import layers."""


class TidarError(ValueError):
    """A mistake in input, configuration or files, explained for the person who made it.

    The message says what was wrong, what was given, and what is allowed. Broken invariants of our own
    are `AssertionError`s and never reach a user in a correct program.
    """
