"""The application's files: models, and chats as JSON."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path

import platformdirs

import edgemistral


@dataclass
class Chat:
    """A conversation. messages: as `Model.chat` takes them."""

    messages: list[dict[str, str]] = field(default_factory=list)
    changed: float = field(default_factory=time.time)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def title(self) -> str:
        """The first question, or the title of a new chat."""
        return " ".join(self.messages[0]["content"].split())[:60] if self.messages else "New chat"


class Library:
    """A folder with models and chats."""

    def __init__(self, folder: Path) -> None:
        self.models_folder, self._chats = folder / "models", folder / "chats"
        self.kv_store = folder / "read before"       # keys and values, so that an old chat continues at once
        for each in (self.models_folder, self._chats):
            each.mkdir(parents=True, exist_ok=True)

    @classmethod
    def of_this_user(cls) -> Library:
        return cls(Path(platformdirs.user_data_dir("edgemistral-desktop", appauthor=False)))

    def models(self) -> list[Path]:
        """All models; the demo model, which always exists, is first."""
        return [edgemistral.demo_model(), *sorted(self.models_folder.glob("*.safetensors"))]

    def chats(self) -> list[Chat]:
        """All chats, the last changed first. Files that cannot be read are skipped."""
        found = []
        for path in self._chats.glob("*.json"):
            try:
                found.append(Chat(**json.loads(path.read_text(encoding="utf-8"))))
            except (OSError, ValueError, TypeError):
                continue
        return sorted(found, key=lambda chat: -chat.changed)

    def save(self, chat: Chat) -> None:
        chat.changed = time.time()
        path = self._chats / f"{chat.id}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(chat)), encoding="utf-8")
        partial.replace(path)

    def delete(self, chat: Chat) -> None:
        (self._chats / f"{chat.id}.json").unlink(missing_ok=True)
