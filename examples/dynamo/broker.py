"""A broker of Dynamo's event plane, so that workers bind no address of their own for it.

    python examples/dynamo/broker.py 127.0.0.1 5555 5556

Without one each worker listens at every address of its machine (ZeroMQ's tcp://0.0.0.0). Workers and frontends are told
of it by DYN_ZMQ_BROKER_URL="xsub=tcp://127.0.0.1:5555 , xpub=tcp://127.0.0.1:5556". It ends with Ctrl-C or SIGTERM.
"""

import argparse
import contextlib
import signal

import zmq


def main() -> None:
    parser = argparse.ArgumentParser(description="A broker of Dynamo's event plane.")
    parser.add_argument("host", help="Address to bind, such as 127.0.0.1.")
    parser.add_argument("publishers", type=int, help="Port for those that publish; 0: any.")
    parser.add_argument("subscribers", type=int, help="Port for those that subscribe; 0: any.")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with zmq.Context() as context, context.socket(zmq.XSUB) as inward, context.socket(zmq.XPUB) as outward:
        inward.linger = outward.linger = 0
        inward.bind(f"tcp://{arguments.host}:{arguments.publishers}")
        outward.bind(f"tcp://{arguments.host}:{arguments.subscribers}")
        ends = [socket.getsockopt_string(zmq.LAST_ENDPOINT) for socket in (inward, outward)]
        print(f"xsub={ends[0]} , xpub={ends[1]}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            zmq.proxy(inward, outward)


if __name__ == "__main__":
    main()
