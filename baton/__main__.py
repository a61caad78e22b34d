"""`python -m baton`: the `baton` command."""

from baton_launch.main import main

if __name__ == "__main__":
    main()
