"""The local HTTP interface: the model card's sample JSON, the OpenAI interface, and a chat page.

    from edgemistral.server import create_app

    app = create_app(model)        # an ASGI application: uvicorn.run(app), or mounted into one of yours
"""

try:
    from edgemistral.server.app import create_app
    from edgemistral.server.service import Refused
except ModuleNotFoundError as error:
    from edgemistral.extras import missing

    if hint := missing(error):
        raise ModuleNotFoundError(hint, name=error.name) from None
    raise

__all__ = ["Refused", "create_app"]
