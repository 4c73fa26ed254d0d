"""`python -m isotone.concrete_tickets`: the same as `isotone concrete-tickets`."""

from isotone.concrete_tickets.cli import main

if __name__ == "__main__":
    main()
