"""The naive forms that the fast paths are held to."""


def method(values):
    """FILL: the method, written from the equations alone."""
    rest, ordered = list(values), []
    while rest:
        ordered.append(min(rest))
        rest.remove(ordered[-1])
    return ordered
