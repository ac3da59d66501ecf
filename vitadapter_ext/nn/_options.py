"""Checks of what modules and methods are built with. Each raises a `ValueError` that says what was given."""


def check_size(name: str, size: int) -> None:
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"{name} is {size!r}; it must be a whole number of at least 1")


def check_probability(name: str, p: float) -> None:
    if not isinstance(p, (int, float)) or not 0 <= p < 1:
        raise ValueError(f"{name} is {p!r}; it must be a probability in [0, 1)")
