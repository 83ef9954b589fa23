"""The rows of a bench's table: printed as they come, and kept in a JSON file."""

import json


class Rows(list):
    """Rows of a table, dicts of plain values.

    Args:
      head: what the JSON file holds besides the rows.
      show: row -> its line.
      path: of the JSON file, which is written after every row, because a bench may be stopped; '' for none.
    """

    def __init__(self, head: dict, show, path: str):
        super().__init__()
        self._head, self._show, self._path = head, show, path

    def add(self, row: dict) -> None:
        """Appends and prints a row."""
        self.append(row)
        print(self._show(row), flush=True)
        if self._path:
            with open(self._path, 'w') as file:
                json.dump({**self._head, 'rows': self}, file, indent=1)
