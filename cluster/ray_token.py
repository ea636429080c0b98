"""Ray's token: who has it, and whether a cluster asks for it.

A Ray that is started here asks for a token by itself (`ray.init`, Ray 2.60). Towards a cluster that
runs somewhere else Ray sends the token only in token mode, which nobody sets by default: so where
this user has a token and has not said otherwise, the mode is set.
"""

from __future__ import annotations

import logging
import os
import sys
import urllib.error
import urllib.request

MODE = "RAY_AUTH_MODE"


def use_token_if_there() -> None:
    """Switch Ray's token mode on for this process where a token exists and no mode is set."""
    from ray._private.authentication.authentication_token_setup import (
        maybe_enable_token_auth_if_token_available,
    )

    logger = logging.getLogger("ray")
    before = logger.level
    logger.setLevel(logging.ERROR)  # it announces that a token will be used
    try:
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    finally:
        logger.setLevel(before)


def warn_if_open() -> None:
    """Say what it means to start a Ray with its token switched off."""
    if os.environ.get(MODE, "").lower() == "disabled":
        sys.stderr.write(
            f"goldcrest: {MODE}=disabled: whoever reaches this machine's ports while Ray runs can "
            "run code as this user\n"
        )


def knock_at_dashboard(url: str, *, seconds: float = 10.0) -> str:
    """`open`, `closed`, or why that is unknown: what the door for jobs says without a token.

    Past any proxy: one that refuses us must not be taken for a cluster that does.
    """
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{url.rstrip('/')}/api/jobs/", timeout=seconds):
            return "open"
    except urllib.error.HTTPError as error:
        return "closed" if error.code in (401, 403) else f"it answers {error.code}"
    except (OSError, ValueError) as error:
        return f"it does not answer: {error}"
