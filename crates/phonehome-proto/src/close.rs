//! Websocket close codes of the protocol (RFC 6455, section 7.4.2: 4000-4999 are the application's).

/// Why one side closed the connection, for the other side's next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloseCode {
    /// The build has its verdict already; this log changes nothing.
    AlreadyFinished,
    /// The token is not for this build.
    Auth,
    /// No hello in time.
    HelloTimeout,
    /// Another replica serves this build.
    NotTheOwner,
    /// Too many agents for now.
    Overloaded,
    /// The peer broke the protocol.
    Protocol,
    /// Storage does not take records for now.
    StorageUnavailable,
    /// A newer connection or attempt took over.
    Superseded,
    /// A message was larger than its limit.
    TooLarge,
    /// No such build or step here.
    UnknownBuild,
    /// No common version.
    Version,
}

impl CloseCode {
    const ALL: [Self; 11] = [
        Self::AlreadyFinished,
        Self::Auth,
        Self::HelloTimeout,
        Self::NotTheOwner,
        Self::Overloaded,
        Self::Protocol,
        Self::StorageUnavailable,
        Self::Superseded,
        Self::TooLarge,
        Self::UnknownBuild,
        Self::Version,
    ];

    /// The number on the wire.
    #[must_use]
    pub fn number(self) -> u16 {
        match self {
            Self::Protocol => 4000,
            Self::Version => 4001,
            Self::Superseded => 4002,
            Self::Auth => 4003,
            Self::UnknownBuild => 4004,
            Self::AlreadyFinished => 4005,
            Self::TooLarge => 4006,
            Self::Overloaded => 4100,
            Self::StorageUnavailable => 4101,
            Self::HelloTimeout => 4102,
            Self::NotTheOwner => 4103,
        }
    }

    /// The code with this number.
    #[must_use]
    pub fn from_number(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|code| code.number() == number)
    }
}

/// Whether a peer that was closed with this number must not come back: 4000-4099. Every other number, the standard
/// ones included, is a reason to connect again.
#[must_use]
pub fn is_fatal(number: u16) -> bool {
    (4000..4100).contains(&number)
}

/// Whether an agent that was closed with this number may come back with its log. 4002 leaves a doubt: a hello of its own
/// that was long under way may have displaced its newer connection. Once welcomed, it asks again; an agent that a newer
/// attempt has displaced is then told so in place of a welcome, and that is final.
#[must_use]
pub fn may_return(number: u16, was_welcomed: bool) -> bool {
    !is_fatal(number) || number == CloseCode::Superseded.number() && was_welcomed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_their_meaning_are_frozen() {
        let table = [(4000, true), (4001, true), (4002, true), (4003, true), (4004, true), (4005, true), (4006, true)];
        let again = [(4100, false), (4101, false), (4102, false), (4103, false)];
        for (number, fatal) in table.into_iter().chain(again) {
            assert_eq!(CloseCode::from_number(number).unwrap().number(), number);
            assert_eq!(is_fatal(number), fatal, "{number}");
        }
        assert!(
            may_return(4002, true) && !may_return(4002, false) && !may_return(4000, true) && may_return(4100, false)
        );
        assert_eq!(CloseCode::from_number(4042), None);
        assert!(is_fatal(4042) && !is_fatal(1006) && !is_fatal(4200));
    }
}
