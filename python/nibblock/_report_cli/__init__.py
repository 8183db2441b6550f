"""`python -m nibblock report`: what files hold, what changed between two, how models compare."""

from nibblock._report_cli.changes import changes
from nibblock._report_cli.describe import describe

__all__ = ["changes", "describe"]
