"""docs/web.md shows the code of the applications that the tests run."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_each_example_is_code_that_runs() -> None:
    """Word for word."""
    code = [path.read_text() for path in (ROOT / "tests/web/apps").glob("*.py")]
    page = (ROOT / "docs/web.md").read_text()
    shown = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.M)

    assert len(shown) >= 15
    assert [block for block in shown if not any(block in text for text in code)] == []
