//! What becomes of an SA when both sides want something of it at once (RFC 7296 sections 2.8.1, 2.25.1 and 2.25.2).

/// Where we are with a pair of SAs, or with an IKE SA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ike::sa) enum Ours {
    /// We do not have it, or not any more.
    Gone,
    /// It is in force, and the peer has had no request of ours about it.
    InForce,
    /// It is an IKE SA in force, and we create, rekey or delete one of its children.
    Busy,
    /// We have asked for another in its place.
    Asked,
    /// As before, and we have agreed to what the peer wants in its place.
    Contested {
        /// Ours has the lowest of the four nonces.
        ours_is_lowest: bool,
    },
    /// We have agreed to what the peer wanted in its place, or to its deletion of it.
    Rekeyed,
    /// We delete it.
    Closing,
}

/// What the peer says about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ike::sa) enum Theirs {
    /// It asks for another in its place.
    Rekeys,
    /// It deletes it.
    Deletes,
    /// It wants to create or rekey a child in the IKE SA.
    WantsChild,
    /// It agrees to what we asked for in its place.
    Agrees,
    /// It answers TEMPORARY_FAILURE.
    IsBusy,
    /// It answers CHILD_SA_NOT_FOUND.
    HasNone,
    /// It refuses for another reason.
    Refuses,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ike::sa) enum Decision {
    /// Answer as if we wanted nothing; from now on the old pair is the peer's to delete.
    Answer,
    /// Answer as if we wanted nothing, and compare nonces when the peer agrees to ours.
    AnswerAndCompare,
    /// Answer TEMPORARY_FAILURE.
    SayBusy,
    /// Answer CHILD_SA_NOT_FOUND.
    SayNone,
    /// Remove it; the answer names our half of it.
    End,
    /// Remove it; the answer does not name it, because our own Delete does.
    EndUnnamed,
    /// Nothing.
    Ignore,
    /// Use the new pair, and delete the old one. What the peer has made is the peer's to delete.
    Use,
    /// Delete the new pair; what the peer has made stays, and the old one is the peer's to delete.
    GiveUp,
    /// What the peer has made takes the place of the old one.
    Yield,
    /// Ask again later.
    AskLater,
    /// Forget the old pair, and ask for a new one without naming it.
    StartOver,
    /// The peer cannot rekey: a fresh IKE SA takes the place of this one.
    Reauthenticate,
}

/// Decides about a pair of SAs.
///
/// | Ours \ theirs | rekeys | deletes | agrees | is busy | has none | refuses |
/// |---|---|---|---|---|---|---|
/// | gone | say none | ignore | use | start over | start over | reauthenticate |
/// | in force | answer | end | give up | ignore | ignore | ignore |
/// | asked | answer and compare | end | use | ask later | start over | reauthenticate |
/// | contested, ours lowest | answer and compare | end | give up | yield | yield | yield |
/// | contested, theirs lowest | answer and compare | end | use | yield | yield | yield |
/// | rekeyed | answer | end | give up | yield | yield | yield |
/// | closing | say busy | end unnamed | give up | ignore | ignore | ignore |
///
/// Who has asked for nothing gets no answers, so those fields are there for completeness.
// RFC 7296 section 2.8.1: what came of the exchange with the lowest of the four nonces goes, by the hand of its creator;
// the creator of what stays deletes what both replace.
// RFC 7296 section 2.25.1: what is being closed cannot be rekeyed for now; what is not there cannot be rekeyed; a Delete
// is answered as usual.
pub(in crate::ike::sa) fn decide(ours: Ours, theirs: Theirs) -> Decision {
    use Decision::*;
    match (ours, theirs) {
        // A pair of SAs has no children.
        (Ours::Busy, _) | (_, Theirs::WantsChild) => Ignore,

        (Ours::Gone, Theirs::Rekeys) => SayNone,
        (Ours::Gone, Theirs::Deletes) => Ignore,
        (Ours::Gone, Theirs::Agrees) => Use,
        (Ours::Gone, Theirs::IsBusy | Theirs::HasNone) => StartOver,
        (Ours::Gone, Theirs::Refuses) => Reauthenticate,

        (Ours::InForce, Theirs::Rekeys) => Answer,
        (Ours::InForce, Theirs::Deletes) => End,
        (Ours::InForce, Theirs::Agrees) => GiveUp,
        (Ours::InForce, Theirs::IsBusy | Theirs::HasNone | Theirs::Refuses) => Ignore,

        (Ours::Asked | Ours::Contested { .. }, Theirs::Rekeys) => AnswerAndCompare,
        (Ours::Asked | Ours::Contested { .. }, Theirs::Deletes) => End,
        (Ours::Asked, Theirs::Agrees) => Use,
        (Ours::Asked, Theirs::IsBusy) => AskLater,
        (Ours::Asked, Theirs::HasNone) => StartOver,
        (Ours::Asked, Theirs::Refuses) => Reauthenticate,

        (Ours::Contested { ours_is_lowest }, Theirs::Agrees) => {
            if ours_is_lowest {
                GiveUp
            } else {
                Use
            }
        }
        (Ours::Contested { .. }, Theirs::IsBusy | Theirs::HasNone | Theirs::Refuses) => Yield,

        (Ours::Rekeyed, Theirs::Rekeys) => Answer,
        (Ours::Rekeyed, Theirs::Deletes) => End,
        (Ours::Rekeyed, Theirs::Agrees) => GiveUp,
        (Ours::Rekeyed, Theirs::IsBusy | Theirs::HasNone | Theirs::Refuses) => Yield,

        (Ours::Closing, Theirs::Rekeys) => SayBusy,
        (Ours::Closing, Theirs::Deletes) => EndUnnamed,
        (Ours::Closing, Theirs::Agrees) => GiveUp,
        (Ours::Closing, Theirs::IsBusy | Theirs::HasNone | Theirs::Refuses) => Ignore,
    }
}

/// Decides about an IKE SA. A Delete, of the IKE SA or of a child, is answered as usual wherever we are.
///
/// | Ours \\ theirs | rekeys | wants a child | agrees | is busy | refuses |
/// |---|---|---|---|---|---|
/// | in force | answer | answer | give up | ignore | ignore |
/// | busy with a child | say busy | answer | give up | ignore | ignore |
/// | asked | answer and compare | say busy | use | ask later | reauthenticate |
/// | contested, ours lowest | say busy | say busy | give up | yield | yield |
/// | contested, theirs lowest | say busy | say busy | use | yield | yield |
/// | rekeyed | say busy | say busy | give up | yield | yield |
/// | closing | say busy | say busy | give up | ignore | ignore |
// RFC 7296 section 2.25.2: no IKE SA is rekeyed while one of its children is at work, and no child while its IKE SA is.
pub(in crate::ike::sa) fn decide_ike(ours: Ours, theirs: Theirs) -> Decision {
    use Decision::*;
    match (ours, theirs) {
        (_, Theirs::Deletes) => End,
        (Ours::InForce, Theirs::Rekeys | Theirs::WantsChild) => Answer,
        (Ours::Busy, Theirs::WantsChild) => Answer,
        (Ours::Asked, Theirs::Rekeys) => AnswerAndCompare,
        (
            Ours::Gone | Ours::Contested { .. } | Ours::Rekeyed | Ours::Closing,
            Theirs::Rekeys | Theirs::WantsChild,
        )
        | (Ours::Busy, Theirs::Rekeys)
        | (Ours::Asked, Theirs::WantsChild) => SayBusy,

        (
            Ours::Asked
            | Ours::Contested {
                ours_is_lowest: false,
            },
            Theirs::Agrees,
        ) => Use,
        (
            Ours::Gone
            | Ours::InForce
            | Ours::Busy
            | Ours::Rekeyed
            | Ours::Closing
            | Ours::Contested {
                ours_is_lowest: true,
            },
            Theirs::Agrees,
        ) => GiveUp,

        (Ours::Asked, Theirs::IsBusy) => AskLater,
        (Ours::Asked, Theirs::HasNone | Theirs::Refuses) => Reauthenticate,
        (
            Ours::Contested { .. } | Ours::Rekeyed,
            Theirs::IsBusy | Theirs::HasNone | Theirs::Refuses,
        ) => Yield,
        (
            Ours::Gone | Ours::InForce | Ours::Busy | Ours::Closing,
            Theirs::IsBusy | Theirs::HasNone | Theirs::Refuses,
        ) => Ignore,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: [(&str, Ours); 7] = [
        ("gone", Ours::Gone),
        ("in force", Ours::InForce),
        ("asked", Ours::Asked),
        (
            "contested, ours lowest",
            Ours::Contested {
                ours_is_lowest: true,
            },
        ),
        (
            "contested, theirs lowest",
            Ours::Contested {
                ours_is_lowest: false,
            },
        ),
        ("rekeyed", Ours::Rekeyed),
        ("closing", Ours::Closing),
    ];
    const THEIRS: [Theirs; 6] = [
        Theirs::Rekeys,
        Theirs::Deletes,
        Theirs::Agrees,
        Theirs::IsBusy,
        Theirs::HasNone,
        Theirs::Refuses,
    ];

    fn words(decision: Decision) -> &'static str {
        match decision {
            Decision::Answer => "answer",
            Decision::AnswerAndCompare => "answer and compare",
            Decision::SayBusy => "say busy",
            Decision::SayNone => "say none",
            Decision::End => "end",
            Decision::EndUnnamed => "end unnamed",
            Decision::Ignore => "ignore",
            Decision::Use => "use",
            Decision::GiveUp => "give up",
            Decision::Yield => "yield",
            Decision::AskLater => "ask later",
            Decision::StartOver => "start over",
            Decision::Reauthenticate => "reauthenticate",
        }
    }

    /// Every row of a table in the documentation above is what is decided.
    fn holds(rows: &[(&str, Ours)], columns: &[Theirs], decide: impl Fn(Ours, Theirs) -> Decision) {
        let source = include_str!("collision.rs");
        for (name, ours) in rows {
            let cells: Vec<&str> = columns
                .iter()
                .map(|theirs| words(decide(*ours, *theirs)))
                .collect();
            let row = format!("/// | {name} | {} |", cells.join(" | "));
            assert!(source.lines().any(|line| line == row), "{row}");
        }
    }

    #[test]
    fn the_table_of_pairs_is_what_is_decided() {
        holds(&OURS, &THEIRS, decide);
    }

    #[test]
    fn the_table_of_ike_sas_is_what_is_decided() {
        let mut rows = OURS;
        rows[0] = ("busy with a child", Ours::Busy);
        let columns = [
            Theirs::Rekeys,
            Theirs::WantsChild,
            Theirs::Agrees,
            Theirs::IsBusy,
            Theirs::Refuses,
        ];
        holds(&rows, &columns, decide_ike);
    }

    // RFC 7296 section 2.8.1: exactly one of the two that were made at once stays, whichever has the lowest nonce.
    #[test]
    fn both_sides_keep_the_same_one_of_two() {
        for decide in [decide, decide_ike] {
            for first_is_lowest in [true, false] {
                let side =
                    |ours_is_lowest| decide(Ours::Contested { ours_is_lowest }, Theirs::Agrees);
                let (first, second) = (side(first_is_lowest), side(!first_is_lowest));
                assert!(matches!(
                    (first, second),
                    (Decision::GiveUp, Decision::Use) | (Decision::Use, Decision::GiveUp)
                ));
            }
        }
    }
}
