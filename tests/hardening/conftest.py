"""Registers the longer profile before pytest's plugin looks for it; `tests/helpers/effort.py` has it."""

import tests.helpers.effort  # noqa: F401 (it registers)
