"""`python -m hub`: the same as `outrider hub`."""

from hub.cli import app

app()
