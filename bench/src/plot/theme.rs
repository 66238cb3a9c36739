//! Colours, markers and text. The colours of series are those of Okabe and Ito, which people with any kind of colour
//! vision tell apart; markers differ too.

use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};
use std::sync::OnceLock;

/// Series a picture can have: each has a colour and a marker of its own.
pub(super) const MAX_SERIES: usize = 8;

/// What the page behind a picture is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Theme {
    /// White.
    Light,
    /// Nearly black, as GitHub's dark pages.
    Dark,
}

impl Theme {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Light, Self::Dark];

    /// As in file names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Light => "light",
            Self::Dark => "dark",
        }
    }

    pub(super) fn background(self) -> RGBColor {
        match self {
            Self::Light => RGBColor(0xff, 0xff, 0xff),
            Self::Dark => RGBColor(0x0d, 0x11, 0x17),
        }
    }

    pub(super) fn foreground(self) -> RGBColor {
        match self {
            Self::Light => RGBColor(0x1f, 0x23, 0x28),
            Self::Dark => RGBColor(0xe6, 0xed, 0xf3),
        }
    }

    /// Black or white, whichever is easier to read on a colour (by the contrast ratio of WCAG 2).
    pub(super) fn on(self, color: RGBColor) -> RGBColor {
        let linear = |channel: u8| {
            let part = f64::from(channel) / 255.0;
            if part <= 0.04045 { part / 12.92 } else { ((part + 0.055) / 1.055).powf(2.4) }
        };
        let luminance = 0.2126 * linear(color.0) + 0.7152 * linear(color.1) + 0.0722 * linear(color.2);
        // Contrast is (lighter + 0.05) / (darker + 0.05).
        if (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05) { BLACK } else { WHITE }
    }

    /// Lines of the grid.
    pub(super) fn grid(self) -> RGBColor {
        match self {
            Self::Light => RGBColor(0xd8, 0xde, 0xe4),
            Self::Dark => RGBColor(0x30, 0x36, 0x3d),
        }
    }

    /// Colour of a series; the dark theme has the two blues exchanged, so that the first series stands out in both.
    pub(super) fn series(self, index: usize) -> RGBColor {
        const VERMILLION: RGBColor = RGBColor(0xd5, 0x5e, 0x00);
        const GREEN: RGBColor = RGBColor(0x00, 0x9e, 0x73);
        const PURPLE: RGBColor = RGBColor(0xcc, 0x79, 0xa7);
        const ORANGE: RGBColor = RGBColor(0xe6, 0x9f, 0x00);
        const YELLOW: RGBColor = RGBColor(0xf0, 0xe4, 0x42);
        const BLUE: RGBColor = RGBColor(0x00, 0x72, 0xb2);
        const SKY: RGBColor = RGBColor(0x56, 0xb4, 0xe9);
        let (first, other) = match self {
            Self::Light => (BLUE, SKY),
            Self::Dark => (SKY, BLUE),
        };
        let colours = [first, VERMILLION, GREEN, ORANGE, PURPLE, other, self.foreground(), YELLOW];
        colours[index % MAX_SERIES]
    }
}

/// Text of a size in pixels.
pub(super) fn font(size: u32) -> FontDesc<'static> {
    static REGISTERED: OnceLock<()> = OnceLock::new();
    // An SVG asks for the reader's own sans-serif; this font measures text for both formats and draws it in PNG.
    REGISTERED.get_or_init(|| {
        let valid = register_font("sans-serif", FontStyle::Normal, notosans::REGULAR_TTF).is_ok();
        debug_assert!(valid, "the embedded font is a font");
    });
    ("sans-serif", size).into_font()
}

/// Draws the marker of a series around a pixel.
pub(super) fn marker<DB: DrawingBackend>(
    area: &DrawingArea<DB, plotters::coord::Shift>,
    index: usize,
    (x, y): (i32, i32),
    size: i32,
    color: RGBColor,
) -> Result<(), DrawingAreaErrorKind<DB::ErrorType>> {
    let filled = color.mix(0.8).filled();
    let polygon = |corners: &[(i32, i32)]| {
        let corners: Vec<_> = corners.iter().map(|(dx, dy)| (x + dx, y + dy)).collect();
        area.draw(&Polygon::new(corners, filled))
    };
    let line = |from: (i32, i32), to: (i32, i32)| {
        let path = vec![(x + from.0, y + from.1), (x + to.0, y + to.1)];
        area.draw(&PathElement::new(path, color.stroke_width(2)))
    };
    let (s, wide) = (size, size * 5 / 4);
    match index % MAX_SERIES {
        0 => area.draw(&Circle::new((x, y), size, filled)),
        1 => polygon(&[(0, -wide), (wide, s), (-wide, s)]),
        2 => polygon(&[(-s, -s), (s, -s), (s, s), (-s, s)]),
        3 => polygon(&[(0, -wide), (wide, 0), (0, wide), (-wide, 0)]),
        4 => polygon(&[(0, wide), (wide, -s), (-wide, -s)]),
        5 => line((-s, -s), (s, s)).and_then(|()| line((-s, s), (s, -s))),
        6 => line((-wide, 0), (wide, 0)).and_then(|()| line((0, -wide), (0, wide))),
        _ => area.draw(&Circle::new((x, y), size, color.stroke_width(2))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_stand_out_from_every_bar() {
        for theme in Theme::ALL {
            for index in 0..MAX_SERIES {
                let color = theme.series(index);
                let brightness = u32::from(color.0) + u32::from(color.1) + u32::from(color.2);
                match theme.on(color) {
                    BLACK => assert!(brightness > 200, "black on {color:?}"),
                    other => assert!(other == WHITE && brightness < 400, "{other:?} on {color:?}"),
                }
            }
        }
        assert_eq!(Theme::Dark.on(RGBColor(0xe6, 0xed, 0xf3)), BLACK);
        assert_eq!(Theme::Light.on(RGBColor(0x1f, 0x23, 0x28)), WHITE);
    }
}
