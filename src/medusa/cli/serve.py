"""`medusa serve`: an OpenAI-compatible server."""

from __future__ import annotations

from typing import Any

from medusa.cli.options import load_model, with_options
from medusa.errors import MedusaError
from medusa.serve.settings import ServerSettings
from medusa.settings import EngineSettings
from medusa.terminal import notice


@with_options
def serve(*, server: ServerSettings, engine: EngineSettings) -> None:
    """Serve the model to programs that speak OpenAI's interface."""
    try:
        from medusa.serve.guard import Keys
        from medusa.serve.run import bind, log_to_stderr
        from medusa.serve.run import serve as run
    except ModuleNotFoundError as error:
        missing = f"the server needs {error.name}: pip install 'medusa-decode[serve]'"
        raise MedusaError(missing) from None
    keys = Keys.read(server.api_key_file)
    if not server.local and not keys:
        notice(f"Warning: anyone who reaches {server.host} can use this server: give it an --api-key-file.")
    bound = bind(server)  # first: to load a model takes long
    lm = load_model(engine, num_slots=server.slots, max_length=server.context)
    log_to_stderr()
    host = f"[{server.host}]" if ":" in server.host else server.host
    notice(f"{server.served_name or lm.name} at http://{host}:{bound.getsockname()[1]}/v1; Ctrl-C ends it.")
    run(lm, server, keys, bound)


def add_to(app: Any) -> None:
    app.command()(serve)
