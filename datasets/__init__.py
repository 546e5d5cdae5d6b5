"""Data sets, one file each, and what the scripts share: patches, transforms, processes, results."""


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: it names the thing and the mend."""
