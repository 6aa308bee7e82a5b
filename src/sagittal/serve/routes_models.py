"""The models that are served."""

from __future__ import annotations

from fastapi import APIRouter, Request

from sagittal.serve.service import service_of
from sagittal.serve.views import ModelList

router = APIRouter(prefix="/api/v1", tags=["models"])


@router.get("/models")
def models(request: Request) -> ModelList:
    """List the models with their channels, labels and options."""
    return ModelList(models=[model.view() for model in service_of(request).models.values()])
