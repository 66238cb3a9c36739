//! Plans for people: the forest as text and as a picture, and why a batch is planned as it is.

mod explain;
mod forest_picture;
mod forest_text;

pub use explain::{Candidate, explain};
pub use forest_picture::svg;
pub use forest_text::forest;
