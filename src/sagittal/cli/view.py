"""`sagittal view`: look at a scan and its labels in a browser."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators


def view(
    image: Path,
    label_maps: Annotated[tuple[Path, ...], Parameter(negative="")] = (),
    /,
    *,
    compare: Annotated[tuple[Path, Path] | None, Parameter(negative="")] = None,
    names: Annotated[Path | None, Parameter(name="--labels")] = None,
    series_uid: str | None = None,
    port: Annotated[int, Parameter(validator=validators.Number(gte=0, lte=65535))] = 0,
    no_browser: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Look at a scan and its labels in a browser: three planes and 3D, on this machine alone. Ctrl-C ends it.

    Args:
        image: the scan: NIfTI, NRRD, MetaImage, MGH or a DICOM series; STUDY#UID is one of several
        label_maps: label maps of it
        compare: two label maps to lay upon one another or side by side
        names: what the values mean: a dataset.json or a bundle; by itself the dataset.json beside the first label map
        series_uid: which DICOM series to take where there are several
        port: to listen on; 0 takes a free one
        no_browser: print the address only
    """
    import tempfile
    import webbrowser

    from sagittal.cli.dicom import declared
    from sagittal.cli.stopping import ended_by_sigterm
    from sagittal.errors import ResourceError
    from sagittal.serve.viewing import Viewing, prepare

    both = [*label_maps, *(compare or ())]
    if names is None and both and (beside := both[0].parent / "dataset.json").is_file():
        names = beside
    spec = declared(names)[0] if names is not None else None
    with ended_by_sigterm(), tempfile.TemporaryDirectory(prefix="sagittal-view-") as folder:
        sets = [*(compare or ()), *label_maps]
        showing = prepare(image, sets, spec, Path(folder), compare=compare is not None, series_uid=series_uid)
        try:
            server = Viewing(showing, port)
        except OSError as error:
            raise ResourceError(
                f"--port {port}: can't be listened on ({error.strerror}). Choose another, or leave it out.", code="port"
            ) from None
        with server:
            print(f"for research use; not a medical device\n{server.url}\nCtrl-C ends it", file=sys.stderr, flush=True)
            if not no_browser:
                webbrowser.open(server.url)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                return 0
    return 0
