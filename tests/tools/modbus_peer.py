"""A Modbus TCP device in a process of its own: `python -m tests.tools.modbus_peer PORT`.

Holding 0 to 9 hold what is written, 2 and 3 a float32; holding 20 is stuck at 7; 30 takes long to answer; 40 is busy;
input 0 is 215; coil 5 can be switched.
"""

from __future__ import annotations

import asyncio
import sys

from pymodbus.constants import ExcCodes
from pymodbus.server import StartAsyncTcpServer
from pymodbus.simulator import DataType, SimData, SimDevice


async def slow(
    function: int, start: int, address: int, count: int, current: list[int], values: object
) -> ExcCodes | None:
    if address == 30:
        await asyncio.sleep(5)
    if address == 40:
        return ExcCodes.DEVICE_BUSY
    if address == 20 and isinstance(values, list):
        values[:] = [7]
    return None


async def main(port: int) -> None:
    coils = [SimData(0, count=16, values=False, datatype=DataType.BITS)]
    holding = [SimData(0, count=50, values=0, datatype=DataType.REGISTERS)]
    inputs = [SimData(0, count=4, values=215, datatype=DataType.REGISTERS)]
    device = SimDevice(1, simdata=(coils, coils, holding, inputs), action=slow)
    print("up", flush=True)
    await StartAsyncTcpServer(device, address=("127.0.0.1", port))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
