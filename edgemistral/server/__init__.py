"""The local HTTP interface: the model card's sample JSON, the OpenAI interface, and a chat page.

    from edgemistral.server import create_app

    app = create_app(model)        # an ASGI application: uvicorn.run(app), or mounted into one of yours
"""

from edgemistral.server.app import create_app
from edgemistral.server.service import Refused

__all__ = ["Refused", "create_app"]
