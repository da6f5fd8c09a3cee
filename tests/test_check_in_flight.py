"""tools/check_in_flight.py on small programs as cuobjdump prints them."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import check_in_flight  # noqa: E402

PRODUCT = "HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR4], R24, gsb0"
OTHER = "HGMMA.64x64x16.F32.BF16 R24, R92, gdesc[UR4], R24, gsb0"
ALL, ALL_BUT_ONE = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"
LOAD = "LDSM.16.MT88.4 R88, [R3+0x800]"
AGAIN = "@P0 BRA 0x0000"


def sass(*lines):
    rows = [f"        /*{16 * k:04x}*/      {line} ;  /* 0x0 */" for k, line in enumerate(lines)]
    return "\n".join(["\t\tFunction : kernel", *rows])


@pytest.mark.parametrize(
    ("lines", "writes"),
    [
        ((LOAD, PRODUCT, ALL, "EXIT"), 0),
        ((PRODUCT, LOAD, ALL, "EXIT"), 1),
        ((PRODUCT, "FMUL R91, R3, R4", ALL, "EXIT"), 1),
        ((PRODUCT, "FMUL R92, R3, R4", ALL, "EXIT"), 0),
        ((PRODUCT, "LDS.128 R86, [R3]", ALL, "EXIT"), 1),
        ((PRODUCT, "STS.128 [R3], R88", "ISETP.NE.AND P0, PT, R88, RZ, PT", ALL, "EXIT"), 0),
        # around a loop: waited for in the next turn, behind or in front of what writes
        ((LOAD, ALL, PRODUCT, AGAIN, ALL, "EXIT"), 1),
        ((ALL, LOAD, PRODUCT, AGAIN, ALL, "EXIT"), 0),
        # the older of two products is complete, the newer one is not
        ((PRODUCT, OTHER, ALL_BUT_ONE, LOAD, ALL, "EXIT"), 0),
        ((OTHER, PRODUCT, ALL_BUT_ONE, LOAD, ALL, "EXIT"), 1),
        # one way around the wait
        ((PRODUCT, "@P0 BRA 0x0030", ALL, LOAD, ALL, "EXIT"), 1),
        ((PRODUCT, "BRA 0x0030", LOAD, ALL, LOAD, "EXIT"), 0),
        # only a table of addresses leads there
        (("BRXU UR4, -0x750", "EXIT", PRODUCT, LOAD, ALL, "EXIT"), 1),
    ],
)
def test_writes_in_flight_are_found(lines, writes):
    kernels = check_in_flight.functions(sass(*lines))
    assert len(check_in_flight.hazards(kernels["kernel"])) == writes


def test_exit_status():
    assert check_in_flight.main(sass(LOAD, PRODUCT, ALL, "EXIT")) == 0
    assert check_in_flight.main(sass(PRODUCT, LOAD, ALL, "EXIT")) == 1
    assert check_in_flight.main(sass("EXIT")) == 1, "nothing was checked"
