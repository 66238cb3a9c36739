//! What texts say of a model: heads, and their elements.

use pat_rs::{AttentionShape, Dtype, Error};

/// What a file or a command says of the model a batch is of. What it does not say is absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ModelParts {
    /// Query heads and KV heads.
    pub heads: Option<(u32, u32)>,
    /// Elements of the heads.
    pub elements: ElementParts,
}

/// What is said of the elements of heads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ElementParts {
    /// Elements per head of Q and K.
    pub head_dim: Option<u32>,
    /// Elements per head of V and O, where they are not those of Q and K.
    pub value_head_dim: Option<u32>,
    /// Element type of Q and O.
    pub dtype: Option<Dtype>,
    /// Element type of K and V, where it is not that of Q.
    pub kv_dtype: Option<Dtype>,
}

impl ElementParts {
    /// All that a shape has.
    pub fn of(shape: AttentionShape) -> Self {
        Self {
            head_dim: Some(shape.head_dim()),
            value_head_dim: Some(shape.v_head_dim()).filter(|&dim| dim != shape.head_dim()),
            dtype: Some(shape.dtype()),
            kv_dtype: Some(shape.kv_dtype()).filter(|&dtype| dtype != shape.dtype()),
        }
    }

    /// What either says, where both do not contradict each other; `owner` is whose the other is.
    ///
    /// # Errors
    /// They do.
    pub fn agreed(self, own: Self, owner: &str) -> pat_rs::Result<Self> {
        fn one<T: Copy + PartialEq>(
            (argument, owner): (&str, &str),
            (asked, own): (Option<T>, Option<T>),
            text: impl Fn(T) -> String,
        ) -> pat_rs::Result<Option<T>> {
            match (asked, own) {
                (Some(asked), Some(own)) if asked != own => {
                    let expected = format!("{} or nothing for {owner}", text(own));
                    Err(Error::invalid(argument, text(asked), expected))
                }
                _ => Ok(asked.or(own)),
            }
        }
        let number = |number: u32| number.to_string();
        let name = |dtype: Dtype| dtype.name().to_owned();
        Ok(Self {
            head_dim: one(("head_dim", owner), (self.head_dim, own.head_dim), number)?,
            value_head_dim: one(("value_head_dim", owner), (self.value_head_dim, own.value_head_dim), number)?,
            dtype: one(("dtype", owner), (self.dtype, own.dtype), name)?,
            kv_dtype: one(("kv_dtype", owner), (self.kv_dtype, own.kv_dtype), name)?,
        })
    }

    /// The shape with so many heads. Where nothing is said, it has head dimension 128 and f16.
    ///
    /// # Errors
    /// As [`AttentionShape::new`].
    pub fn shape(self, (q_heads, kv_heads): (u32, u32)) -> pat_rs::Result<AttentionShape> {
        let (head_dim, dtype) = (self.head_dim.unwrap_or(128), self.dtype.unwrap_or(Dtype::F16));
        let shape = AttentionShape::new(q_heads, kv_heads, head_dim, dtype)?;
        let shape = self.value_head_dim.map_or(Ok(shape), |head_dim| shape.with_v_head_dim(head_dim))?;
        Ok(self.kv_dtype.map_or(shape, |dtype| shape.with_kv_dtype(dtype)))
    }
}

/// `32/8`: query heads, KV heads. `None` where the text has another form.
pub fn parse_heads(text: &str) -> Option<(u32, u32)> {
    let (q, kv) = text.split_once('/')?;
    Some((q.parse().ok()?, kv.parse().ok()?))
}

/// A type of 8 bits, by the name that [`Dtype::name`] gives it.
pub fn parse_kv_dtype(name: &str) -> Option<Dtype> {
    Dtype::EIGHT_BIT.iter().copied().find(|dtype| dtype.name() == name)
}

/// The names that [`parse_kv_dtype`] takes, each as `write` has it: `e4m3 or e5m2`.
pub fn kv_dtype_names(write: impl Fn(&str) -> String) -> String {
    Dtype::EIGHT_BIT.iter().map(|dtype| write(dtype.name())).collect::<Vec<_>>().join(" or ")
}

/// The type that [`Dtype::name`] names so; `fp16` and `half` are f16 too.
pub fn parse_dtype(name: &str) -> Option<Dtype> {
    match name {
        "f16" | "fp16" | "half" => Some(Dtype::F16),
        "bf16" => Some(Dtype::Bf16),
        _ => None,
    }
}

/// The value of an expression for the element types of a shape on the host: `$q` is that of Q and O, `$kv` that of K and V. `$none`
/// is the value for types that no kernel takes together.
///
/// ```
/// use pat_rs::{AttentionShape, Dtype};
///
/// # fn main() -> pat_rs::Result<()> {
/// let shape = AttentionShape::new(8, 2, 64, Dtype::F16)?.with_kv_dtype(Dtype::E5m2);
/// let bytes = pat_workloads::with_element_types!(shape, |Q, Kv| Some([size_of::<Q>(), size_of::<Kv>()]), else None);
/// assert_eq!(bytes, Some([2, 1]));
/// # Ok(())
/// # }
/// ```
#[macro_export]
macro_rules! with_element_types {
    ($shape:expr, |$q:ident, $kv:ident| $value:expr, else $none:expr) => {
        $crate::with_element_types!(@ $shape, $q, $kv, $value, $none,
            (F16 ::half::f16) (Bf16 ::half::bf16), [(E4m3 ::pat_rs::cpu::E4m3) (E5m2 ::pat_rs::cpu::E5m2)])
    };
    (@ $shape:expr, $q:ident, $kv:ident, $value:expr, $none:expr, $(($dtype:ident $type:ty))*, $eight_bit:tt) => {{
        let (dtype, kv_dtype) = ($shape.dtype(), $shape.kv_dtype());
        match dtype {
            $(::pat_rs::Dtype::$dtype => {
                type $q = $type;
                $crate::with_element_types!(@ kv_dtype, $dtype $type, $kv, $value, $none, $eight_bit)
            })*
            _ => $none,
        }
    }};
    (@ $kv_dtype:ident, $dtype:ident $type:ty, $kv:ident, $value:expr, $none:expr, [$(($code:ident $code_type:ty))*]) => {
        match $kv_dtype {
            ::pat_rs::Dtype::$dtype => {
                type $kv = $type;
                $value
            }
            $(::pat_rs::Dtype::$code => {
                type $kv = $code_type;
                $value
            })*
            _ => $none,
        }
    };
}
