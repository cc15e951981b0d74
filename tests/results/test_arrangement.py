"""Table 1's arrangements: which vector stands where, and where the targets are read."""

from __future__ import annotations

import pytest

from prototok.results.arrangement import Arrangement


@pytest.mark.parametrize(
    ("name", "length", "layout"),
    [
        ("e m*", 4, "e m m m"),
        ("e m*", 1, "e"),
        ("e m*+1", 4, "e m m m m"),
        ("e m*+1", 1, "e m"),
        ("e*", 3, "e e e"),
        ("e* m*", 4, "e e m m"),
        ("e* m*", 5, "e e e m m"),
        ("(e m)*", 5, "e m e m e"),
        ("e3 m*", 5, "e1 e2 e3 m m"),
        ("e3 m*", 2, "e1 e2"),
        ("e3 m*+3", 2, "e1 e2 e3 m m"),
        ("e3 m*+2", 2, "e1 e2 e3 m"),
    ],
)
def test_layout(name: str, length: int, layout: str) -> None:
    arrangement = Arrangement.parse(name)
    letters = (
        ["e"] if arrangement.leading == 1 else [f"e{k + 1}" for k in range(arrangement.leading)]
    )
    letters += ["m"] if arrangement.has_m else []
    found = [letters[i] for i in arrangement.layout(length).tolist()]
    assert found == layout.split()
    assert len(found) == arrangement.input_length(length)


@pytest.mark.parametrize(
    ("name", "length", "count"),
    [
        ("e m*", 4, 1),
        ("e m*+1", 4, 0),
        ("e*", 3, 3),
        ("e* m*", 5, 3),
        ("(e m)*", 5, 1),
        ("e3 m*", 5, 3),
        ("e3 m*", 2, 2),
        ("e3 m*+2", 4, 1),
        ("e3 m*+3", 4, 0),
    ],
)
def test_targets_that_e_alone_decides(name: str, length: int, count: int) -> None:
    assert Arrangement.parse(name).read_before_m(length) == count


@pytest.mark.parametrize("name", ["", "m e*", "e m", "e m*+2", "e3 m*+4", "e0 m*", "e100 m*", 3])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^arrangement: .*is not known"):
        Arrangement.parse(name)
