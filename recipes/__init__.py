"""The recipes that come with the program, one TOML file each; `--recipe NAME` finds them wherever it is installed."""
