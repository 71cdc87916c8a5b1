"""`python -m embedder` is the `embedder` command."""

from embedder.cli import main

if __name__ == "__main__":
    main()
