"""What a figure depends on: the arguments that matter, and what made each file that a later run uses."""

# Arguments of all scripts that no figure depends on: where things lie, what is written, where it runs. A run may be
# resumed with others (what lies in a data set is compared apart), and tables do not mark them.
NO_EFFECT = frozenset((
    "cache", "cache_dir", "checkpoint_every", "checkpoint_seconds", "columns", "data_path", "debug", "device",
    "eval_every", "figure6", "name", "output_dir", "pictures", "query", "resume", "save_features", "save_pictures",
    "save_plots", "table", "top", "workers"))
