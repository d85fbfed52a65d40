"""Failures that a user can act on.

Every message says what is wrong, with which file, sample or key, and what to do about it: the command
line prints it as one line and leaves with status 1. Anything else that escapes is a bug of ours.
"""


class FastSSLError(Exception):
    """Base of all failures that are the input's, the machine's or the caller's, not the program's."""


class BetonError(FastSSLError):
    """A ``.beton`` file is damaged, truncated, or uses a part of the format that we do not read."""


class JpegError(FastSSLError):
    """A picture cannot be decoded, or decodes to something other than its header promises."""


class Interrupted(FastSSLError):
    """The work was asked to stop (SIGINT, SIGTERM), and what was done is saved. The command line leaves with 130."""
