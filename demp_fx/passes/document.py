"""What is kept as a JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from pydantic import BaseModel, ValidationError

from demp_fx.errors import UsageError


class Document(BaseModel):
    """Data that is a file of its own."""

    what: ClassVar[str]  # it is called in messages

    def to_json(self) -> str:
        return self.model_dump_json(indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises `UsageError` where the text is no such document."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise UsageError(f"not a {cls.what}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read from a JSON file. Raises `UsageError` where there is none that holds such a
        document."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} cannot be read: {error}") from error
        return cls.from_json(text)
