"""torch's attention over KV that is stored once for each sample, by one of its kernels: flash, and cuDNN's. They read
the same copies, which are most of a GPU's memory where samples are many."""

from torch.nn.attention import SDPBackend, sdpa_kernel

from . import sdpa_packed


class Kernel:
    def __init__(self, name: str, backend: SDPBackend) -> None:
        self.NAME, self.backend = name, backend

    def reason_against(self, case):
        return sdpa_packed.shape_reason(case)

    def prepare(self, inputs):
        attend = inputs.once(f"{sdpa_packed.NAME} {inputs.which}", lambda: copied(inputs))

        def run():
            with sdpa_kernel(self.backend):
                return attend()

        return run

    def bytes_read(self, case):
        return sdpa_packed.bytes_read(case)


def copied(inputs):
    if reason := sdpa_packed.copy_reason(inputs.case):
        raise MemoryError(reason)
    return sdpa_packed.prepare(inputs)


FLASH = Kernel("sdpa flash", SDPBackend.FLASH_ATTENTION)
CUDNN = Kernel("sdpa cudnn", SDPBackend.CUDNN_ATTENTION)
