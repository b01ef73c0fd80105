"""torch's attention over KV that is stored once for each sample, by one of its kernels: flash, and cuDNN's."""

from torch.nn.attention import SDPBackend, sdpa_kernel

from . import sdpa_packed


class Kernel:
    def __init__(self, name: str, backend: SDPBackend) -> None:
        self.NAME, self.backend = name, backend

    def reason_against(self, case):
        return sdpa_packed.reason_against(case)

    def prepare(self, inputs):
        attend = sdpa_packed.prepare(inputs)

        def run():
            with sdpa_kernel(self.backend):
                return attend()

        return run

    def bytes_read(self, case):
        return sdpa_packed.bytes_read(case)


FLASH = Kernel("sdpa flash", SDPBackend.FLASH_ATTENTION)
CUDNN = Kernel("sdpa cudnn", SDPBackend.CUDNN_ATTENTION)
