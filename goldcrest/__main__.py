"""`python -m goldcrest`: the same program as the `goldcrest` command."""

from goldcrest.pipelines.cli import main

if __name__ == "__main__":
    main()
