//! The loss curve as an SVG, drawn here: two axes, the points, and a running mean through them.

use std::fmt::Write as _;

const WIDTH: f64 = 800.0;
const HEIGHT: f64 = 480.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 52.0;

/// `points` are (step, loss), steps rising; points that are not finite are left out.
pub(crate) fn loss_curve(title: &str, points: &[(f64, f64)]) -> String {
    let points: Vec<_> =
        points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect();
    let frame =
        Frame { x: Axis::of(points.iter().map(|p| p.0)), y: Axis::of(points.iter().map(|p| p.1)) };
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n"
    );
    text(&mut svg, (LEFT, 24.0), "start", title);
    frame.axes(&mut svg);
    if points.len() < 60 {
        for (x, y) in points.iter().map(|point| frame.at(*point)) {
            let colour = "fill=\"#7aa6d8\"";
            add(&mut svg, format_args!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.5\" {colour}/>"));
        }
    }
    frame.line(&mut svg, &points, "stroke=\"#7aa6d8\" stroke-width=\"1\"");
    frame.line(&mut svg, &running_mean(&points), "stroke=\"#c0392b\" stroke-width=\"2\"");
    svg.push_str("</svg>\n");
    svg
}

/// Where values lie on the page.
struct Frame {
    x: Axis,
    y: Axis,
}

impl Frame {
    fn at(&self, (x, y): (f64, f64)) -> (f64, f64) {
        let (left, bottom) = (LEFT, HEIGHT - BOTTOM);
        let (width, height) = (WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM);
        (left + self.x.share(x) * width, bottom - self.y.share(y) * height)
    }

    fn axes(&self, svg: &mut String) {
        let (right, bottom) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
        for tick in self.y.ticks() {
            let (_, y) = self.at((self.x.low, tick));
            add(svg, format_args!("<path d=\"M{LEFT} {y:.1}H{right:.1}\" stroke=\"#ddd\"/>"));
            text(svg, (LEFT - 8.0, y + 4.0), "end", &self.y.label(tick));
        }
        for tick in self.x.ticks() {
            let (x, y) = self.at((tick, self.y.low));
            add(svg, format_args!("<path d=\"M{x:.1} {y:.1}v5\" stroke=\"#444\"/>"));
            text(svg, (x, y + 20.0), "middle", &self.x.label(tick));
        }
        let lines = "stroke=\"#444\" fill=\"none\"";
        add(svg, format_args!("<path d=\"M{LEFT} {TOP}V{bottom:.1}H{right:.1}\" {lines}/>"));
        text(svg, ((LEFT + right) / 2.0, HEIGHT - 12.0), "middle", "step");
        text(svg, (LEFT, TOP - 4.0), "end", "loss");
    }

    fn line(&self, svg: &mut String, points: &[(f64, f64)], style: &str) {
        let path: Vec<String> = points
            .iter()
            .map(|point| self.at(*point))
            .map(|(x, y)| format!("{x:.1},{y:.1}"))
            .collect();
        let path = path.join(" ");
        add(svg, format_args!("<polyline points=\"{path}\" fill=\"none\" {style}/>"));
    }
}

fn add(svg: &mut String, element: std::fmt::Arguments<'_>) {
    let _infallible = writeln!(svg, "{element}");
}

fn text(svg: &mut String, (x, y): (f64, f64), anchor: &str, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let place = format_args!("x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\"").to_string();
    add(svg, format_args!("<text {place}>{text}</text>"));
}

/// Mean over a window of a twentieth of the points, centred.
fn running_mean(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let half = points.len() / 40;
    (0..points.len())
        .map(|index| {
            let reach = half.min(index).min(points.len() - 1 - index);
            let window = &points[index - reach..=index + reach];
            let count = u32::try_from(window.len()).map_or(1.0, f64::from);
            (points[index].0, window.iter().map(|p| p.1).sum::<f64>() / count)
        })
        .collect()
}

/// The range of an axis, widened to whole ticks.
struct Axis {
    low: f64,
    high: f64,
    tick: f64,
}

impl Axis {
    fn of(values: impl Iterator<Item = f64> + Clone) -> Axis {
        let low = values.clone().fold(f64::INFINITY, f64::min);
        let high = values.fold(f64::NEG_INFINITY, f64::max);
        let (low, high) = match (low.is_finite(), high > low) {
            (false, _) => (0.0, 1.0),
            (true, false) => (low - 0.5, low + 0.5),
            (true, true) => (low, high),
        };
        // The round number (1, 2 or 5 times a power of ten) that makes five ticks or a few more.
        let rough = (high - low) / 5.0;
        let power = 10f64.powf(rough.log10().floor());
        let tick = [1.0, 2.0, 5.0]
            .into_iter()
            .rev()
            .map(|m| m * power)
            .find(|t| *t <= rough)
            .unwrap_or(power);
        Axis { low: (low / tick).floor() * tick, high: (high / tick).ceil() * tick, tick }
    }

    fn share(&self, value: f64) -> f64 {
        (value - self.low) / (self.high - self.low)
    }

    fn ticks(&self) -> impl Iterator<Item = f64> + '_ {
        (0u32..64)
            .map(|index| self.low + f64::from(index) * self.tick)
            .take_while(|t| *t <= self.high + self.tick / 2.0)
    }

    fn label(&self, value: f64) -> String {
        let decimals = if self.tick >= 1.0 {
            0
        } else {
            1 + usize::from(self.tick < 0.1) + usize::from(self.tick < 0.01)
        };
        format!("{value:.decimals$}")
    }
}
