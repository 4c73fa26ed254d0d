"""`python -m isotone.sketching`: the same as `isotone sketching`."""

from isotone.sketching.cli import main

if __name__ == "__main__":
    main()
