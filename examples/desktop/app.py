"""A chat on the desktop: python examples/desktop/app.py [MODEL]"""

import sys
from pathlib import Path

from PySide6.QtWidgets import QApplication

sys.path.insert(0, str(Path(__file__).parent))      # the files next to this one, from any working directory

from library import Library
from look import dress
from window import Window


def main() -> int:
    app = QApplication(sys.argv)
    app.setApplicationName("edgemistral")
    dress(app)
    window = Window(Library.of_this_user(), model=sys.argv[1] if len(sys.argv) > 1 else None)
    window.show()
    return app.exec()


if __name__ == "__main__":
    sys.exit(main())
