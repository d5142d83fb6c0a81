"""What more GPUs would give, worked out from a measurement of one and of two of them.

    python scaling_model.py RECORD SHARE SUMS

RECORD is of `nanovllm bench --tp 2`, with the one engine alone in it. The seconds of a phase with N
ranks are taken to be fixed + work / N + sums(N): work is what is shared out (products, attention),
fixed what each rank does whole (launches, the draw, the small products' floor), sums the time in
kernels that wait for other ranks. Those of two ranks are SHARE of the pass, as a profile of it
says; with more they are assumed to grow as the bytes that a rank receives do, 2 (N - 1) / N, and by
a microsecond for each further rank in each of a step's SUMS. Not in it: links that are slower
between more GPUs, and ranks that come late.
"""

import json
import sys
from pathlib import Path

_MEETING_SECONDS = 1e-6


def main() -> None:
    record = json.loads(Path(sys.argv[1]).read_bytes())
    share_of_sums = float(sys.argv[2])
    one, two = record["single"]["run"], record["runs"][0]
    num_sums = float(sys.argv[3]) * two["decode_steps"]
    print("ranks  seconds  speed-up  efficiency  in sums")
    for ranks in (1, 2, 4, 8):
        seconds = waiting = 0.0
        for phase in ("prefill_seconds", "decode_seconds"):
            sums_of_two = share_of_sums * two[phase]
            work = 2 * (one[phase] - two[phase] + sums_of_two)
            sums = 0.0
            if ranks > 1:
                sums = sums_of_two * 2 * (ranks - 1) / ranks
                if phase == "decode_seconds":
                    sums += num_sums * (ranks - 2) * _MEETING_SECONDS
            seconds += one[phase] - work + work / ranks + sums
            waiting += sums
        speedup = (one["prefill_seconds"] + one["decode_seconds"]) / seconds
        print(
            f"{ranks:5d}  {seconds:7.2f}  {speedup:8.2f}  {speedup / ranks:10.0%}"
            f"  {waiting / seconds:7.0%}"
        )


if __name__ == "__main__":
    main()
