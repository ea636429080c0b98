"""Requests of the speaker endpoint say what they mean, or are refused.

A field that is ignored can turn a question into another one: without the speaker whom a recording
claims to be, `/verify` compares recordings with each other, and accepts two of any one person.
"""

from __future__ import annotations

from collections.abc import Iterable

from fastapi import HTTPException, Request
from fastapi.routing import APIRoute

from goldcrest.pipelines.endpoints.bundles import refuse

_REPEATED = "audio"  # the one field that may be there more than once


async def only_known_fields(request: Request) -> None:
    """A dependency of routes: HTTPException 422 where a form or a query has a field that the route
    does not know, an empty one, or one twice."""
    route = request.scope["route"]
    assert isinstance(route, APIRoute)
    _check(request.query_params, (each.alias for each in route.dependant.query_params), "query")
    form = await request.form()
    _check(form, (each.alias for each in route.dependant.body_params), "form")
    for name in form:
        if form[name] == "":
            raise _refused(name, f"the form's field '{name}' is empty: fill it, or leave it out")
        if name != _REPEATED and len(form.getlist(name)) > 1:
            raise _refused(name, f"the form has the field '{name}' more than once")


def _check(given: Iterable[str], known: Iterable[str], where: str) -> None:
    names = list(known)
    for name in given:
        if name not in names:
            has = f"its fields are: {', '.join(names)}" if names else "it has none"
            raise _refused(name, f"the {where} of this route has no field '{name[:64]}'; {has}")


def _refused(name: str, message: str) -> HTTPException:
    return refuse(422, "invalid", message, param=name[:64])
