"""Configuration of uvicorn, for one worker or many."""

import uvicorn

from service.server.protocol import BoundedProtocol
from service.settings import Settings

HUNG_SECONDS = 60  # a worker that is silent for longer is killed; uvicorn's default of 5 s kills busy workers
GRACE_SECONDS = 10  # after draining, for requests in progress
KEEP_ALIVE_SECONDS = 30


def uvicorn_config(settings: Settings, **application: object) -> uvicorn.Config:
    """Return the configuration; `application` is uvicorn's `app`, and `factory` if that is a factory."""
    BoundedProtocol.seconds = settings.request_seconds
    return uvicorn.Config(
        host=settings.host,
        port=settings.port,
        http=BoundedProtocol,
        loop="service.server.event_loop:BatchAcceptLoop",
        log_config=None,
        log_level=settings.log_level,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # the address of the client is not used
        workers=settings.workers,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_worker_healthcheck=HUNG_SECONDS,
        **application,  # type: ignore[arg-type]  # app and factory
    )
