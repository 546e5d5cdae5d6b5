"""What belongs to no model and no data set: a run's arguments and log, processes, storage, results, drawing."""


class UserError(Exception):
    """A mistake that the user can correct. The message is one line that says what is wrong and how to fix it."""
