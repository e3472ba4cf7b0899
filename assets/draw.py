"""Draws ring.png, bird.png and face.png, the pictures of configs/toy: python assets/draw.py."""

from pathlib import Path

from PIL import Image, ImageDraw

SIZE, SUPERSAMPLED = 128, 8
HERE = Path(__file__).resolve().parent


class Canvas:
    """Black and white shapes on a square of side 1, y downwards."""

    def __init__(self):
        self.side = SIZE * SUPERSAMPLED
        self.image = Image.new("L", (self.side, self.side), 255)
        self.draw = ImageDraw.Draw(self.image)

    def disc(self, x, y, rx, ry=None, fill=0):
        """An ellipse about (x, y)."""
        ry = rx if ry is None else ry
        box = [self.side * v for v in (x - rx, y - ry, x + rx, y + ry)]
        self.draw.ellipse(box, fill=fill)

    def shape(self, *corners, fill=0):
        """A polygon."""
        self.draw.polygon([(self.side * x, self.side * y) for x, y in corners], fill=fill)

    def arc(self, x, y, r, start, end, width):
        """A part of a circle, in degrees clockwise from three o'clock."""
        box = [self.side * v for v in (x - r, y - r, x + r, y + r)]
        self.draw.arc(box, start, end, fill=0, width=round(self.side * width))

    def line(self, *points, width):
        """A line through points."""
        places = [(self.side * x, self.side * y) for x, y in points]
        self.draw.line(places, fill=0, width=round(self.side * width), joint="curve")

    def save(self, name):
        """Write the drawing beside this file."""
        self.image.resize((SIZE, SIZE), Image.Resampling.LANCZOS).save(
            HERE / f"{name}.png", optimize=True
        )


def ring():
    """A ring with a stone."""
    c = Canvas()
    c.disc(0.5, 0.58, 0.36)
    c.disc(0.5, 0.58, 0.27, fill=255)
    c.shape((0.38, 0.08), (0.62, 0.08), (0.70, 0.17), (0.5, 0.34), (0.30, 0.17), fill=0)
    c.shape((0.42, 0.12), (0.58, 0.12), (0.62, 0.165), (0.5, 0.26), (0.38, 0.165), fill=255)
    c.save("ring")


def bird():
    """A bird on a twig, looking to the right."""
    c = Canvas()
    c.disc(0.46, 0.52, 0.25, 0.20)
    c.disc(0.66, 0.32, 0.14)
    c.shape((0.77, 0.27), (0.93, 0.34), (0.77, 0.38))
    c.shape((0.28, 0.44), (0.06, 0.66), (0.16, 0.72), (0.38, 0.66))
    c.disc(0.70, 0.29, 0.035, fill=255)
    c.arc(0.40, 0.46, 0.15, 20, 120, 0.025)
    c.shape((0.30, 0.44), (0.52, 0.46), (0.40, 0.62), fill=255)
    c.shape((0.335, 0.465), (0.47, 0.48), (0.40, 0.575))
    c.line((0.44, 0.70), (0.42, 0.84), width=0.025)
    c.line((0.54, 0.69), (0.55, 0.84), width=0.025)
    c.line((0.10, 0.86), (0.90, 0.83), width=0.035)
    c.save("bird")


def face():
    """A smiling face with hair."""
    c = Canvas()
    c.disc(0.5, 0.52, 0.40)
    c.disc(0.5, 0.52, 0.355, fill=255)
    for i in range(5):
        x = 0.34 + 0.08 * i
        c.line((x, 0.16), (x + 0.05 * (i - 2), 0.03), width=0.03)
    c.disc(0.36, 0.44, 0.05, 0.07)
    c.disc(0.64, 0.44, 0.05, 0.07)
    c.line((0.28, 0.31), (0.42, 0.29), width=0.025)
    c.line((0.58, 0.29), (0.72, 0.31), width=0.025)
    c.arc(0.5, 0.54, 0.22, 20, 160, 0.05)
    c.save("face")


if __name__ == "__main__":
    ring()
    bird()
    face()
