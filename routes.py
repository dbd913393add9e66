"""HTTP routes: what the last runs did, for the browser and for API users."""

from .report import recent_runs

RUNS_ROUTE = "/skein/runs"


def register() -> None:
    """Add the routes to ComfyUI's server. Without a server (the pack used as a library) nothing happens."""
    import sys

    server = sys.modules.get("server")
    instance = getattr(getattr(server, "PromptServer", None), "instance", None)
    if instance is None:
        return
    from aiohttp import web

    @instance.routes.get(RUNS_ROUTE)
    async def runs(_request):
        """The last runs under the cache, oldest first: {"runs": [...]}, each as `Run.as_dict` gives it."""
        return web.json_response({"runs": [run.as_dict() for run in recent_runs()]})
