"""The lower bound of FastAPI: a route that reads the body and returns a constant."""

import sys

import uvicorn
from fastapi import FastAPI, Request, Response

app = FastAPI()


@app.get("/ready")
async def ready() -> dict[str, bool]:
    """Report that the server accepts requests."""
    return {"ready": True}


@app.post("/predict")
async def predict(request: Request) -> Response:
    """Return a constant response."""
    await request.body()
    return Response(b'{"logits":[[0.0,0.0,0.0]],"rul":[0.0]}', media_type="application/json")


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), access_log=False, log_level="warning")
