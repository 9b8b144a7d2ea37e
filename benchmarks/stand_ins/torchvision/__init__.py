"""Not torchvision: the little of it that diffusers' LCM example uses, where the real one cannot be imported."""

from torchvision import io as io
from torchvision import transforms as transforms
