"""What the inputs and secrets of a run are is nowhere in Temporal: not in a history, an id, a queue's name or a failure."""

from tests.support.canary import Mark
from tests.support.client import Client, file_input
from tests.support.handoff import HandOff
from tests.support.server import Server
from tests.support.waiting import until


def test_no_value_is_in_what_temporal_keeps(handoff: HandOff, handing_server: Server, client: Client) -> None:
    secret, value = Mark(), Mark()
    client.machine()

    def run(status: str, seconds: float = 0.0) -> str:
        made = handoff.numbered(
            client,
            input_values={"seconds": seconds, "amount": value.new()},
            sensitive_input_values={"password": secret.new(), "nested": {"pin": secret.new()}},
            file_inputs=[file_input(secret.new().encode(), f"{value.new()}.txt")],
        )
        run_id = str(made["id"])
        if seconds:
            until(lambda: client.get_run(run_id)["status"] == "running", 30)
            client.report(run_id, status="cancelled", reason=value.new())
        until(lambda: client.get_run(run_id)["status"] == status, 30, what=status)
        return run_id

    executor = handoff.executor(handing_server, client)
    runs = [run("success"), run("cancelled", 60)]
    executor.kill()
    handoff.executor(handing_server, client, GIVES_UP="yes")  # with an exception that says everything
    runs.append(run("error"))
    assert "without a report" in str(client.get_run(runs[-1])["error"])

    def kept() -> bytes:
        logs = [part.log for part in (handoff.temporal, *handoff.workers)]
        files = [*handoff.temporal.folder.glob(f"{handoff.temporal.database.name}*"), *logs]
        return b"".join(file.read_bytes() for file in files)

    until(lambda: all(f"run-{run_id}-1-1".encode() in kept() for run_id in runs), what="the histories on disk")
    everything = kept()
    assert b"The executor failed." in everything, "the failure is there, and found"
    assert secret.found(everything) is None
    assert value.found(everything) is None
