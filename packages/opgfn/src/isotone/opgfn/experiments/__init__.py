"""The arms of the reproduction: each a function of its settings and seed that returns what JSON can say."""
