"""`python -m isotone.lighthgnn`: the same as `isotone lighthgnn`."""

from isotone.lighthgnn.cli import main

if __name__ == "__main__":
    main()
