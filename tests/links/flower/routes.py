"""Every route of the server that flwr would expose."""

from __future__ import annotations


def flower_routes() -> set[tuple[str, str]]:
    """Every method and path of the server that flwr would expose."""
    from fastapi.routing import iter_route_contexts
    from flwr.superlink.main import create_app

    found = set()
    for context in iter_route_contexts(create_app().routes):
        for method in getattr(context.route, "methods", None) or {"GET"}:
            found.add((method, context.path))
    return found
