# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_phonehome_agent_global_optspecs
    string join \n url= build= step= token= token-file= ca= pin= client-cert= client-key= tee= merge pty pty-size= grace-period= leftovers= rewrite-signal= parent-death-signal= user= no-new-privileges hold= hold-on-failure= termination-grace= termination-log= linger= start= spool-memory= spool-dir= spool-limit= overflow= offline-limit= on-offline= require-delivery redact-env= redact-file= label= labels= labels-file= annotations-file= name= graveyard= generation= death-deps= death-signal= expected-exit= birth-deps= wait-for= birth-timeout= ready-when= log-format= log-level= trace= config= print-config h/help V/version
end

function __fish_phonehome_agent_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_phonehome_agent_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_phonehome_agent_using_subcommand
    set -l cmd (__fish_phonehome_agent_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l url -d 'Where to phone home: wss://HOST:PORT[/PREFIX], or ws:// without encryption. Without it the command runs unobserved' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l build -d 'Build this output belongs to; required with a URL' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l step -d 'Step of the build, usually one per container [default: main]' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l token -d 'Secret of this build; never shown, never passed on to the command. Prefer the variable or --token-file' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l token-file -d 'File that holds the token' -r -F
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l ca -d 'PEM file of roots to trust, in place of the system\'s' -r -F
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l pin -d 'Public key the server must have, sha256:HEX of its SubjectPublicKeyInfo. Needs no CA, and wins over --ca' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l client-cert -d 'PEM file of this agent\'s certificate, for mutual TLS' -r -F
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l client-key -d 'PEM file of its private key' -r -F
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l tee -d 'Copy the command\'s output to the agent\'s own as well, so that the node\'s log still works' -r -f -a "on\t'Do it'
off\t'Leave it'"
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l pty-size -d 'Size of that terminal; by default that of the agent\'s own terminal, else 80x24' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l grace-period -d 'Between TERM and KILL for the command\'s process group' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l leftovers -d 'What to do about processes that outlive the command' -r -f -a "wait\t'The log ends when they have ended'
terminate\t'They get 5 s to end by themselves if they hold the output open, then TERM, and KILL after the grace period'
leave\t'Nothing is done to them; output that they hold open is read for 5 s more'"
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l rewrite-signal -d 'Pass another signal on than the one that came; 0 passes nothing on. Numbers or names: 15:3,HUP:QUIT' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l parent-death-signal -d 'Signal that the agent gets when its own parent dies' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l user -d 'Run the command as this user. The group is the user\'s in /etc/passwd, else the number of the user' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l hold -d 'Stay this much longer after the end, so that a person can look inside; TERM ends it' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l hold-on-failure -d 'The same after a failure only; the longer of the two counts' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l termination-grace -d 'The pod\'s termination grace: after TERM everything is done within this time. A number is seconds, as in a manifest' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l termination-log -d 'File that gets a short reason when the command fails, if it exists' -r -F
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l linger -d 'How long to stay after the command\'s end until the server has accepted its log' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l start -d 'Start the command now and hold its output until the server answers, or wait for the server first' -r -f -a "now\t'At once'
connected\t'When the server has welcomed this agent'"
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l spool-memory -d 'Memory for output that the server has not confirmed yet. When it is full the command waits; nothing is lost' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l spool-dir -d 'Directory for output that the server does not confirm in time, when memory is not enough and for the next agent after a restart of the container. Without it there is memory only' -r -F
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l spool-limit -d 'Most bytes in that directory' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l overflow -d 'When all of that is full: block the command, so that nothing is lost, or drop the middle of the output and say how much' -r -f -a "block\t'It stays in the pipe, and the command waits'
drop\t'The middle is left out and counted; the beginning and the newest output stay'"
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l offline-limit -d 'How long the server may confirm nothing before --on-offline applies; off for no limit' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l on-offline -d 'After that: continue, no longer waiting for room, or stop the command' -r -f -a "continue\t'Let the command go on, dropping output if need be'
stop\t'End the command'"
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l redact-env -d 'Variables whose values are secret: wherever output shows one, also encoded, a marker takes its place' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l redact-file -d 'Files whose contents are secret likewise, each as one value; of a directory, every file in it' -r -F
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l label -d 'A label of this build, shown and searched at the server. May be repeated' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l labels -d 'Several labels at once, separated by commas. --label wins over it, key by key' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l labels-file -d 'File of the Kubernetes Downward API with the pod\'s labels; read again whenever it changes' -r -F
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l annotations-file -d 'The same with the pod\'s annotations, which become labels that begin with `annotation.`' -r -F
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l name -d 'Name of this container in the graveyard. With one, its birth and death are told there, in the form of kubexit' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l graveyard -d 'Directory that the containers of the pod share [default: /graveyard]' -r -F
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l generation -d 'Marks what is carved there: tombstones with another mark are ignored. The pod\'s uid, say, in a directory that outlives the pod' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l death-deps -d 'End the command when one of these has died; do not start it when one is dead already' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l death-signal -d 'Signal that ends it then; KILL follows after the grace period [default: TERM]' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l expected-exit -d 'Ends that count as success then: exit codes, ranges of them, signals, or any: 0-3,143,SIGINT. A crash never does' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l birth-deps -d 'Start the command only when all of these have been born, or, as NAME:ready, are ready' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l wait-for -d 'Start the command only when this probe passes, for what has no agent: tcp:PORT, tcp:HOST:PORT, http://HOST:PORT/PATH, unix:PATH, file:PATH (exists), content:PATH (is not empty) or exec:COMMAND. Can be given several times; in the variable each stands on a line of its own' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l birth-timeout -d 'How long to wait for all of them; off for no limit' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l ready-when -d 'Tell siblings that the command is ready when this passes: a probe as for --wait-for, output:REGEX (a line of its output matches) or notify (it says so itself, on NOTIFY_SOCKET)' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l log-format -d 'Form of the agent\'s own log, on standard error' -r -f -a "text\t'For people'
json\t'One JSON object per line'"
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l log-level -d 'Least severity of it' -r -f -a "error\t'The agent failed'
warn\t'A person should look'
info\t'One line for each thing that happens'
debug\t'Every decision'
trace\t'Every frame'"
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l trace -d 'What becomes of its finer lines: ring keeps the latest and shows them before an error; live, or live:MODULE,..., shows them at once; off' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l config -d 'TOML file of options: each key is an option\'s long name, and command is the COMMAND' -r -F
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l merge -d 'One pipe for both streams: their exact order, but no distinction; all of it is stdout'
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l pty -d 'Run the command on a terminal: programs show colour and progress. There is one stream then, stdout'
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l no-new-privileges -d 'The command and its descendants can gain no privileges, by set-user-ID programs say'
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l require-delivery -d 'Exit with 125 when the server has not accepted the complete log. Otherwise delivery never changes the exit code'
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l print-config -d 'Check and print all options, where each comes from, as such a file; run nothing. Secrets are left out'
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -s V -l version -d 'Print version'
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -a "install" -d 'Copy this program to DEST, as an init container does'
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -a "completions" -d 'Print a script that completes the command line'
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -a "man" -d 'Print the manual page'
complete -c phonehome-agent -n "__fish_phonehome_agent_using_subcommand install" -s h -l help -d 'Print help'
complete -c phonehome-agent -n "__fish_phonehome_agent_using_subcommand completions" -s h -l help -d 'Print help'
complete -c phonehome-agent -n "__fish_phonehome_agent_using_subcommand man" -s h -l help -d 'Print help'
