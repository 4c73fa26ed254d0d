"""`python -m isotone.transform_once`: the same as `isotone transform-once`."""

from isotone.transform_once.cli import main

if __name__ == "__main__":
    main()
